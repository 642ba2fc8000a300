"""A loopback hub: enough of the Hugging Face and ModelScope APIs for the real SDKs, with faults on demand.

``python -m hub --models DIR --port P`` serves ``DIR/ORG/NAME`` as the default branch of ORG/NAME and
``DIR/ORG/NAME@REV`` as its branch REV. A file ``.hub.json`` in a model's folder may say ``{"token": "...",
"gated": true}``.
"""

from hub.faults import Fault
from hub.server import HubServer

__all__ = ["Fault", "HubServer"]
