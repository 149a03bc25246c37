"""The relevance budget."""


def check(budget_bytes):
    pass


def enforce(store):
    pass
