"""The networks of torchvision in plain PyTorch, with its module names: what converted weights are compared with.

torchvision itself cannot be asked, because it has no build for every PyTorch that the tests run on. Each file has
`build(name, classes, **model_kwargs)`, which gives a `torch.nn.Module` from images (n, c, h, w) to logits.
"""
