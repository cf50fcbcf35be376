"""What turns token ids into token ids: batches, generation, latency, text."""
