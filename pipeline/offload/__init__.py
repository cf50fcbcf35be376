"""Linear layers on machines that nobody trusts, and that see only noise.

A row comes in as floats. It becomes fixed point in Z_2^64 (`fixed_point`), is hidden under a mask
that is used once (`masks`, `mask_ledger`) or mixed with its prompt's other rows (`mixing`), and
goes to an assistant that multiplies it by public weights (`ring`, `ring_weights`). What comes back
is held against secret vectors (`freivalds`), the mask's own product is taken off, and floats leave.
Everything else of a model stays at home; `home` puts both together as the model's linears.
"""
