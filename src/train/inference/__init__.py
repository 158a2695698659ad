"""Uses a trained model: ``evaluate``, ``generate`` and ``chat``.

``run_folder`` finds out what a folder holds, ``load_run`` loads it. ``generate`` also answers the
sample prompts of training.
"""
