"""Weights in fewer bits as other programs pack them: which tensors make one, and what it means.

A packing knows names and numbers; what reads files, and where numbers go, it does not.
"""
