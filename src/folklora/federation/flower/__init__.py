"""A federation over a network: Flower carries the messages. Needs the extra: ``pip install 'folklora[flower]'``."""
