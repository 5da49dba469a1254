"""Where an image comes from, said in the image: signed C2PA manifests, made and verified."""
