"""3-bit weights, reconstructed as in BRECQ: squared error, inputs from the quantized prefix."""

from logart_vit.settings import Config as Base


class Config(Base):
    """The defaults at 3 bits with a plain reconstruction."""

    w_bit = 3
    optim_metric = "mse"
    optim_mode = "qinp"
