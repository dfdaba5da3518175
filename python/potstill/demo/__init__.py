"""`potstill demo`: the whole way on a real model: cache a teacher, train a smaller student from it, measure
both.
"""
