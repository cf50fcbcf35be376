"""The gateway's HTTP door: OpenAI's endpoints and others' (`dialects`), served before the desk.

A connection is hypercorn's, with bounds (`client_connection`); every request passes the `edge`
(access, rate, body, disconnects, errors) on its way to an endpoint (`app`), which hands the desk an
order and sends what it generates (`answers`, in the `formats` of either endpoint).
"""
