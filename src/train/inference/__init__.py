"""What is done with a trained model: ``evaluate``, ``generate`` and ``chat``.

``run_folder`` finds out what a folder holds, and ``load_run`` loads it. ``generate``, ``chat`` and
the sample answers of training all answer through ``generation``.
"""
