"""A federation over a network: Flower carries the messages. Needs the extra: ``pip install 'folklora[flower]'``."""

from importlib.util import find_spec

from folklora.errors import FederationError

if find_spec("flwr") is None:
    raise FederationError("a federation needs Flower: pip install 'folklora[flower]'")
