"""One call of ``optimize``, in processing order."""
