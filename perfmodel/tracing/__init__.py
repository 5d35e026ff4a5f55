"""From a real program to a Step: one training step on fake tensors, every ATen call recorded, as `Op`s that are priced.

`trace` records (`known` follows small tensors whose values are known, `autocast` casts as a GPU does), `calls` makes
ops of what it recorded, `owners` says whose they are, `growth` grows a whole model from traces of a few of its blocks,
`sizes` makes one program of traces at a few sizes. `traced` does it for a config and `modules` for a user's own module
(`perfmodel.predict_module`); `recorded` keeps what was traced (`perfmodel.traced`, `--traced`) and needs no torch for
what is kept, nor do `regions`, `setups` and `kernels`.
"""
