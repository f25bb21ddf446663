"""What ``make gpu`` runs on a machine with one NVIDIA GPU and no network; each part ends by itself and can go on."""
