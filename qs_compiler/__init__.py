"""A torch.compile backend that compresses a video diffusion transformer while it compiles it."""

__version__ = "0.1.0"
