"""Doors: a stage served over requests and answers, where no channel can stay open.

A request comes in by gRPC, HTTP or a serverless handler, becomes one `InferRequest`, is opened and
answered by one handler, and leaves as one `InferResponse`. Transports know nothing of keys, and the
handler nothing of transports.
"""
