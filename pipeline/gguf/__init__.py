"""Models as llama.cpp keeps them: one GGUF file of metadata, tokenizer and tensors.

A file comes in that nobody has vouched for; what leaves are its tensors by the names that families
know them by, their packed rows as numbers, and the files that a model directory would have beside
its weights. Called by whoever reads models: weights, models, the engine's tokenizer, planning.
"""
