"""4-bit weights, reconstructed as in BRECQ: squared error, inputs from the quantized prefix."""

from logart_vit.settings import Config as Base


class Config(Base):
    """The defaults with a plain reconstruction."""

    optim_metric = "mse"
    optim_mode = "qinp"
