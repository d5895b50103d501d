"""Jobs of ``classfair train`` that are stopped on purpose."""

from contextlib import contextmanager

from classfair.training import engine


@contextmanager
def stopped_where(when, monkeypatch):
    """Ctrl-C instead of the next epoch of the first run for which ``when(run)`` holds."""
    next_epoch = engine.Run.next_epoch

    def stopping(run):
        if when(run):
            raise KeyboardInterrupt
        return next_epoch(run)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "next_epoch", stopping)
        yield
