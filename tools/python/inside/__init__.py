"""What runs inside the sandbox: standard library only, and imported as the package `inside` there.

All of it is in a program's reach: it serves the program, and no promise of the sandbox rests on it once a program has
begun.
"""
