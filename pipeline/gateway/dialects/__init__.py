"""What clients of other services say and expect: OpenAI's responses, Anthropic, Ollama.

A request of each is read into an `Order` for the desk (`*_requests`), and what is generated, piece
by piece, becomes the events of its stream, or the whole that they amount to (`telling`, `*_events`,
`*_lines`). No HTTP is known here, and nothing is generated.
"""
