"""Record the steps of one device and replay them on another: which operator differs first?"""
