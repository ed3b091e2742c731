"""`RunError`: a run that cannot do what it was asked to do, for a reason that its user can mend."""


class RunError(ValueError):
    """Told in one message without a traceback: another world size than asked, no such checkpoint, no GPU, ..."""
