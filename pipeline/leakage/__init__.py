"""What a mode's server can find out about a text, measured by attacking it.

A mode comes in as data: what its server sees of the model's hidden states (`modes`, `views`).
Texts and a public model make observations of it (`public_model`, `observations`); attacks that need
only what that server has turn these back into tokens (`attacks/`, `matching`, `attacker`, `suite`),
and what the mode costs is measured beside (`utility`). A card leaves (`measure`, `cards`), which
the package carries for every mode and which no mode is used without. Called by commands only;
nothing that generates text depends on it, but for the look-up of cards.
"""
