"""Forms, programs, operators and their reference bodies; kernel parts for Triton and C++."""
