"""The operators: one folder each, a narrow public function in `__init__`, implementations in `_<name>.py`."""
