"""pretrain/hf"""
