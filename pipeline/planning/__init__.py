"""Writing manifests, and cutting a model into what each stage needs."""
