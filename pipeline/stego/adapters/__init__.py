"""Hidden messages in the text of other engines: TensorRT-LLM, transformers, vLLM, and on Modal.

An engine calls back with a step's logits. They become the token's conditional distribution
(`conditional`), a request's state picks the token (`request`), and the logits are overwritten so
that the engine can take no other. What an engine calls is a file of its own each; `encoder` puts
message and text on top of any of them. Nothing here is imported by the pipeline, and a file imports
its engine only when it is used.
"""
