"""Decoding of uploaded pictures in processes of their own: `pool` starts and judges them, `worker` is one."""
