"""Serving many clients, on the user's side of the pipeline. It believes no client, and no model.

A door (`http`, or another) takes a request in, reads it into an `Order` (`openai_requests`, for
those who send OpenAI's JSON, or one of the `dialects`), and gives it to the `desk`. The desk knows
no HTTP: it admits, renders and encodes what is asked (`templates`, `chat_tokenizer`), limits how
much there is at once, records sizes and times (`metrics`), and hands back pieces of text as the
engine generates them (`continuations`), calls of tools and thoughts told apart (`answer_parts`).
What an answer has to keep to becomes a mask (`grammars`).
"""
