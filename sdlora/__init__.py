"""sdlora trains LoRAs for diffusion models and tells artists the truth about them."""

__version__ = "0.1.0"
