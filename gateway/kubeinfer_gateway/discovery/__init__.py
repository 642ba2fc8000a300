"""Where models and their endpoints come from."""

from kubeinfer_gateway.discovery.base import Discovery, DiscoveryError

__all__ = ["Discovery", "DiscoveryError"]
