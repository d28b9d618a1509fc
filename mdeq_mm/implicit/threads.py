"""What belongs to one thread."""

import threading


class PerThread(threading.local):
    """Attributes that each thread has for itself, at first those of the class.

    Copies and pickles are as new: what a call has left is of no use to them.
    """

    def __reduce__(self):
        return type(self), ()

    def __deepcopy__(self, memo):
        return type(self)()
