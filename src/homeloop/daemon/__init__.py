"""The block-export daemon: exports, devices and IOThreads under one control."""
