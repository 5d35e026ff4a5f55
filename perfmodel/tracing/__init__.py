"""From a real program to a Step: one training step on fake tensors, every ATen call recorded, as `Op`s that are priced.

`trace` records, `calls` makes ops of what it recorded, `growth` grows a whole model from traces of a few of its blocks,
`traced` and `modules` are `perfmodel predict --traced` and `perfmodel.predict_module`.
"""
