"""3-bit weights, the paper's best method: perturbation Hessian and QDrop inputs."""

from logart_vit.settings import Config as Base


class Config(Base):
    """The defaults at 3 bits."""

    w_bit = 3
