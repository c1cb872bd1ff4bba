"""What a GPU shows in ten minutes: ``python -m tests.gpu --device cuda --out gpu.json``, or ``make gpu``.

Each check is a function of (device, sizes) that returns figures; the runner turns whatever happens into a row
and goes on. The same functions run on the CPU with tiny sizes in ``test_checks.py``.
Modules of the product and packages beyond torch are imported inside the checks: what is missing costs one row.
"""
