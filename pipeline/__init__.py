"""veilpipe's inference pipeline: manifest, models, decoding, stage worker and orchestrator."""
