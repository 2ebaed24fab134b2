"""Models that run from their own Transformers code, with quire's attention, layers, loading and sampling.

`describe` reads a configuration, `build` makes the module tree without memory, `leaves` puts quire's layers into it,
`hook` is how its attention finds the pages of a step, `checkpoint` names its tensors, `proof` refuses at load what
would be wrong at run time, `model` is what the runner sees. For speed, `likeness` finds models that compute what a
Llama does, `inplace` attention and `fused` blocks that quire computes in fewer operations.
"""
