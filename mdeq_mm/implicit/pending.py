"""What a forward pass leaves for its caller to take."""


class Pending:
    """Tensors with graphs that wait to be taken.

    Copies are empty: a tensor with a graph cannot be copied, and a copy of the model,
    such as an average of weights, has no use for it.
    """

    def __init__(self):
        self._items = []

    def __len__(self):
        return len(self._items)

    def __deepcopy__(self, memo):
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    def add(self, item):
        self._items.append(item)

    def take(self):
        items, self._items = self._items, []
        return items
