from tests import typecheck as typecheck  # resolved by name by the run-time type checker
