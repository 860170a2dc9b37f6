"""minisora: Flying MNIST through a small autoencoder and generators over its latents or tokens.

Source: https://github.com/kungfuai/CVlization, examples/generative/video_generation/minisora. Its README's commands are
named with each recipe, and docs/minisora.md has its flags. Full-size recipes want a GPU and, in data/flying_mnist, the
clips that ``mutoscope data make flying-mnist data/flying_mnist`` draws; the tiny ones draw their clips in memory.
"""

from mutoscope.recipe import Data

FULL = Data(root="data/flying_mnist", frames=32, height=256, width=256, workers=4)
TINY = Data(root="flying-mnist://tiny", frames=4, height=16, width=16, cache=True)
