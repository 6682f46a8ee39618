"""The engine and its hosts. `hosts/` alone imports diffusers or ComfyUI."""
