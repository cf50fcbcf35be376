"""The user's end of a pipeline: remote stages joined up, and mended after a loss.

Steps come in from the engine and go to the first stage, results come back from the last. Every
stage is watched over its control channel; what is lost is met again, verified as at first, and the
rest rewound to what is certain.
"""
