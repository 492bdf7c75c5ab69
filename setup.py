from setuptools import setup

setup(cffi_modules=["csrc/io/build_uring.py:ffibuilder"])
