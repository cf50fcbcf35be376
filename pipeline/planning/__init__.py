"""Writing manifests, and cutting a model into what each stage needs.

A model's directory comes in; a manifest with a balanced split and every hash leaves, or a directory
for each stage. Called by commands only.
"""
