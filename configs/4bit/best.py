"""4-bit weights, the paper's best method: perturbation Hessian and QDrop inputs."""

from logart_vit.settings import Config as Base


class Config(Base):
    """The defaults as they stand."""
