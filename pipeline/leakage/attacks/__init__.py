"""Attacks: what a server makes of its observations, each a pure function in a file of its own.

Observations of one text at one layer come in, with what that attacker has besides; a comparison
leaves, which says how unlike an observation any candidate's hidden state is.
"""
