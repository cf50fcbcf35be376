"""Evidence of what a peer runs: who produces it, and who checks it."""
