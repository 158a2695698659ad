"""What is done with a trained model: ``eval``, ``generate``, ``chat`` and ``merge``.

``runfolder`` finds out what a folder holds and loads it; ``evaluate``, ``generate`` and ``chat``
use the loaded model (the last two through ``answering``); ``merge`` writes adapter and base as one
model, with ``checkpoint`` (the base's files), ``adapted`` (what the adapter changes) and ``shards``
(the new files).
"""
