"""Nitro enclave images: file format, measurements, root file system, init."""
