"""The arithmetic: one interface, and what computes it.

`base` says what kernels are; vectors in C (native/), torch and CUDA each are one;
`kernel_selection` decides by processor and self-test, never by a stopwatch. Keys and values live
here too, in the layout that attention reads. Called by models, which compose layers of it; nothing
here knows a model.
"""
